"Two tests run at a time (see pyproject.toml), so each must keep to one thread: threads that wait for each other's cores are far slower than none."
import os

for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'): os.environ[name] = '1'
