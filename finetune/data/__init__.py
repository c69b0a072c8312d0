"""From files to batches, without torch: records -> encoder -> store -> rows -> order -> collate -> batches."""
