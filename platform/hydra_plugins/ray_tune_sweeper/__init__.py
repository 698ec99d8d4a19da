"""Hydra's multirun as a Ray Tune experiment: ``python app.py -m hydra/sweeper=ray_tune lr='interval(0, 1)'``.

The app is any Hydra app. Its function's return value is the objective; what it reports by ``ray.tune.report({...})``
lets a scheduler stop the trial early. ``RayTuneSweeperConf`` has the settings, ``Journal`` reads what a sweep left.
"""
