"""How any detector is trained: the Lightning module, schedules and callbacks."""
