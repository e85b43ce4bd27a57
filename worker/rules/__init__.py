"""Pure rules: who pays, which period, what a change is, and the values they work on. No I/O."""
