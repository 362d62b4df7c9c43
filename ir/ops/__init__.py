"""The mc_opt dialect: one op a file; `op.find_op` finds them by class name."""
