"""All that talks to MLflow: runs, registered versions, and the model that it serves."""
