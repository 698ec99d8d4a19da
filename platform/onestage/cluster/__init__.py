"""Where a training runs. The only room that knows Ray."""
