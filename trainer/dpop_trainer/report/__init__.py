"""What reports share: the HTML shell, figures, text as a reader sees it, tokens as text, Markdown.

Imports nothing of training. A chart or a page of a tool's own stays with the tool.
"""
