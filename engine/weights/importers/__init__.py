"""From a checkpoint to a model directory; one checkpoint format a file."""
