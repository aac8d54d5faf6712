// Typeset what Sphinx has marked as an equation, with the KaTeX that lies beside the pages.
for (const element of document.querySelectorAll('.math')) {
  const display = element.tagName === 'DIV'
  const text = element.textContent.trim().replace(/^\\[([]|\\[)\]]$/g, '')
  katex.render(text, element, {displayMode: display, throwOnError: false})
}
