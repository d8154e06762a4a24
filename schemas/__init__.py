"""The formats this package reads and writes: a page for people, and JSON Schemas for programs."""
