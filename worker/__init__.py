"""The worker: a Celery doorbell, one drain thread, one resident model."""
