def group_order(grouping, target, rows, num_groups, seed=0):
    assert grouping == "contiguous", grouping
    return None
