"""onestage: train, sweep and compare one-stage object detectors on Ray clusters, tracked with MLflow."""

__version__ = "0.1.0"
