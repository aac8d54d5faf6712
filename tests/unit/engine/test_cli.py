"The command `vicc` hands over to the commands of its modules."
import subprocess
import sys
from pathlib import Path

import pytest

from vicc.cli import COMMANDS, main
from vicc.engine.io import CommandParser

ROOT = Path(__file__).parents[3]


def test_help_lists_the_commands_without_importing_torch():
    code = "import sys; from vicc.cli import main\ntry: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    answer = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert answer.returncode == 0 and all(f'  {name} ' in answer.stdout for name in COMMANDS), answer.stderr


@pytest.mark.parametrize('name', COMMANDS)
def test_the_help_of_a_command_fits_on_a_screen(name, monkeypatch, capsys):
    monkeypatch.setenv('COLUMNS', '80')
    with pytest.raises(SystemExit) as ended: main([name, '--help'])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0 and lines[0].startswith(f'usage: vicc {name} ') and '[options]' in ' '.join(lines[:3])
    assert len(lines) <= 40 and max(map(len, lines)) <= 105


@pytest.mark.parametrize('error, code, said', [(ValueError('no videos'), 2, 'vicc toy: no videos'), (FileNotFoundError('x is not there'), 2, 'x is not there'),
                                               (KeyboardInterrupt(), 130, 'Start the same command again to go on')])
def test_a_command_ends_with_one_line_and_a_code(error, code, said, capsys):
    with pytest.raises(SystemExit) as ended, CommandParser('vicc toy', 'FILE', 'Read a file.').exit_codes(): raise error
    assert ended.value.code == code and said in capsys.readouterr().err


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
