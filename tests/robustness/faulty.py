"A decoder that crashes or hangs, by the name of the video. Workers import it: see test_storage.py."
import os
import time

from vicc.prepare import prepare_task as sound_task

def prepare_task(source, *arguments):
    "Like vicc.prepare.prepare_task, where the name does not ask for a fault."
    if 'crash' in source.name: os.abort()
    if 'hang' in source.name: time.sleep(600)
    return sound_task(source, *arguments)
