"""Language models behind three verbs: score, generate, embed. Importing this alone loads no torch."""

from penchant.engine.base import Engine, Generation, Pooling, Progress

__all__ = ["Engine", "Generation", "Pooling", "Progress"]
