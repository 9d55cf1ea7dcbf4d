"""Pictures: figures by matplotlib, and pages that need nothing but themselves."""
