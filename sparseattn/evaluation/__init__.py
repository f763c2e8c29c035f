"""Quality and cost of attention variants on a checkpoint: `compare.py` is the main job."""
