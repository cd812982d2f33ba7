"""Column names that everything speaks. Ids are strings everywhere; time is one integer.

Interactions hold one row an event: USER, ITEM, TIME, and any of the optional columns below. Items
hold one row an item: ITEM, TITLE and any further columns. TIME is integer microseconds since
1970-01-01 UTC, so that sources in seconds, milliseconds or dates order alike.
"""

from __future__ import annotations

USER = "user_id"
ITEM = "item_id"
TIME = "timestamp"
TITLE = "title"

EVENT = "event_type"  # view, click, purchase, like, rating ...
RATING = "rating"
REVIEW = "review"
QUERY = "query"
# Between the values of one cell, such as an item's genres.
VALUES = "|"
OPTIONAL = (EVENT, RATING, REVIEW, QUERY)

SCORE = "score"
RANK = "rank"
STAGE = "stage"
RECOMMENDATION = (USER, ITEM, TITLE, SCORE, RANK, STAGE)

# Which stage an answer's row came from, so that a fallback is never mistaken for the model.
STAGE_FUSED = "llm+interest"
STAGE_LLM = "llm"
STAGE_GENERATED = "llm-generate"
STAGE_INTEREST = "interest"
STAGE_WISH = "text"
STAGE_POPULARITY = "popularity"
