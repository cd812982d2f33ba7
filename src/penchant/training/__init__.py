"""Fine-tuning: examples, packing, losses, the loop and its guards. The recipes of finetune/ are made of these."""
