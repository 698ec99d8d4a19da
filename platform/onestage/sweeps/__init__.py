"""Many trainings over a space of settings: planned, run as trials of Ray Tune, watched, compared and concluded."""
