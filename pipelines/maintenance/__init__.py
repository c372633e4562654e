"""How what is committed was made: the shipped backbone, and the pages and schemas of the configs' fields."""
