"""The parties of `qjam-bench joblib`."""
