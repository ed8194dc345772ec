"""Chat models over HTTP beside transformers' `generate`, and the loop of tokens beside the session calls that it makes."""
