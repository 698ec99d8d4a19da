"""How good the detections of a whole split are."""
