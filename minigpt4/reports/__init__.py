"""Self-contained HTML reports: pages, plots as inline SVG, contact sheets of images, and perceptual hashes."""
