"How Sphinx turns the pages into the site. `.ci/build_docs` calls it; nothing is fetched and nothing is run."
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parents[2]
config = ConfigParser(delimiters=['='], interpolation=None)
config.read(ROOT/'settings.ini', encoding='utf-8')
project, author, version = (config['DEFAULT'][key] for key in ('lib_name', 'author', 'version'))
copyright = author  # noqa: A001
html_title = project

extensions = ['myst_nb', 'sphinx.ext.mathjax']
myst_enable_extensions = ['dollarmath', 'amsmath', 'attrs_block']
myst_heading_anchors = 3
nb_execution_mode = 'off'
nb_render_markdown_format = 'myst'
nb_ipywidgets_js = {}  # they would come from the network
nb_merge_streams = True

html_theme = 'sphinx_book_theme'
html_theme_options = {'show_navbar_depth': 1, 'use_download_button': False, 'use_fullscreen_button': False, 'show_toc_level': 2,
                      'navbar_persistent': []}
html_copy_source = False
html_extra_path = [str(path) for path in (ROOT/'runs'/'prototypes').glob('explorer.html')]
html_static_path = ['static', str(ROOT/'_proc'/'katex')]
# Equations: KaTeX lies beside the pages, so that they can be read offline
mathjax_path = 'katex.min.js'
mathjax_options = {'defer': 'defer'}
html_js_files = [('equations.js', {'defer': 'defer'})]
html_css_files = ['katex.min.css', 'pages.css']
add_module_names = False
toc_object_entries_show_parents = 'hide'
