"""The gateway: images in over REST, answers out, computed by an engine that `export` published."""

__version__ = "0.1.0"
