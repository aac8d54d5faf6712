"The command `vicc` hands over to the commands of its modules."
import subprocess
import sys
from pathlib import Path

import pytest

from vicc.cli import COMMANDS, main

ROOT = Path(__file__).parents[3]


def test_help_lists_the_commands_without_importing_torch():
    code = "import sys; from vicc.cli import main\ntry: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    answer = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert answer.returncode == 0 and all(f'  {name} ' in answer.stdout for name in COMMANDS), answer.stderr


def test_a_sub_command_gets_its_words(monkeypatch):
    given = []
    monkeypatch.setattr('vicc.alternation.main', given.append)
    main(['train', '--recipe', 'demo', '--set', 'seed=1'])
    assert given == [['--recipe', 'demo', '--set', 'seed=1']]


@pytest.mark.parametrize('words', [[], ['trian'], ['train']], ids=['nothing', 'misspelt', 'no options'])
def test_a_wrong_line_ends_with_code_2(words, capsys):
    with pytest.raises(SystemExit) as ended: main(words)
    assert ended.value.code == 2 and 'usage: ' in capsys.readouterr().err


def test_the_command_is_installed_by_setup():
    assert "'console_scripts': ['vicc = vicc.cli:main']" in (ROOT/'setup.py').read_text(encoding='utf-8')
