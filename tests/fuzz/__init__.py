"""Hostile input, made until a time is up: `make fuzz`, or `python -m tests.fuzz --seconds 300`; `make test` runs a short form.

`files.py` and `requests.py` are what is sent as it stands, `mutation.py` changes valid bytes, `parsers.py` has the campaigns in
this process, `served.py` those against a real gateway, `contract.py` the one that reads the gateway's OpenAPI.
"""
