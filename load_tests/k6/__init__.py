"""Load from k6: `shots.py` says what is sent, `runner.py` runs the binary, `search.py` finds the highest rate a server holds."""
