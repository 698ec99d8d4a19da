"""What a training tells MLflow, and how it arrives when the server is slow, away or restarted."""
