"""Several ranks as one engine: the mesh, the part of a transformer that each rank computes, and the rank processes.

Nothing here changes a bit of a result. Rows, branches and output columns are computed by the kernels that compute them on one
rank, and gathered in the order that one rank has them in; there is no sum across ranks. This package knows torch and
torch.distributed, and of models only the `ParallelPlan` that a family declares.
"""
