"A decoder that crashes, hangs or eats memory, by the name of the video. Workers import it: see test_storage.py."
import os
import time

def prepare_task(source, *arguments):
    "Like vicc.prepare.prepare_task, where the name does not ask for a fault."
    if 'crash' in source.name: os.abort()
    if 'hang' in source.name: time.sleep(600)
    if 'memory' in source.name: return len(b'x'*2**34)
    from vicc.prepare import prepare_task as real
    return real(source, *arguments)
