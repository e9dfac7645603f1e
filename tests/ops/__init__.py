"""Tests of `fastgpt.ops`: `test_<operation>.py` proves each reference against its equations in float64, and
`test_table.py` holds every implementation in the table against the references.
"""
