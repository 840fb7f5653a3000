"""Models that are shipped inside the package, so that a build needs no network: `source: {model: builtin:tiny-v3}`."""
