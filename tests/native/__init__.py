"""Tests of what is special to one native operation: its blocks, threads and instruction sets."""
