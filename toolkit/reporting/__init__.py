"""What is shown: figures, HTML, Markdown and tables. Nothing here runs inference."""
