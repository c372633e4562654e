"""What the records of a sequence say, and the page made of it. Nothing here runs a stage."""
