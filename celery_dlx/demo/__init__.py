"""`make demo`: the main job as a story, on real worker processes."""
