"A decoder that crashes or hangs, by the name of the video, and an odd error. Workers import it: see tests/unit/engine/test_io.py."
import os
import time

from vicc.prepare import prepare_task as sound_task

def prepare_task(source, *arguments):
    "Like vicc.prepare.prepare_task, where the name does not ask for a fault."
    if 'crash' in source.name: os.abort()
    if 'hang' in source.name: time.sleep(600)
    return sound_task(source, *arguments)

class Awkward(Exception):
    "An exception that cannot be built from its message, as some libraries have them."
    def __init__(self, code, text): super().__init__(text)

def awkward(): raise Awkward(3, 'odd')
