"""Records of a run, for people and programs: terminal, metrics.jsonl, trackers, report page. No torch."""
