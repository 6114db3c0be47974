"""Published checkpoint files <-> transformers folders: MISS and BLIP both ways, LLaMA, CLIP and LaVIN to a folder."""
