"""The test suite. Folders mirror those of finetune/; three test whole runs instead.

distributed: the same result on any number of ranks, at any stage, after a resume. faults: kills, signals, full disks, damaged
files, untrusted input. launch: every command of launch/ as a user types it.
"""
