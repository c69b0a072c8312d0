"""Developers' tools: fetch public archives and rebuild the data sets that ship with the project."""
