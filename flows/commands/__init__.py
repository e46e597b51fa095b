"""The commands of `python -m flows`, a file a group: what loads slowly is imported when used."""
