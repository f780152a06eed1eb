"""Training for real: the trainer, what a checkpoint holds and whose it is, several processes, the teacher's cache,
a session to steer.
"""
