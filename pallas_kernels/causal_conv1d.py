"""Interim."""
import jax, jax.numpy as jnp
def causal_conv1d(x, weight, bias=None, state=None, *, reset=None, valid=None, activation=None, implementation=None):
    Bn,T,D=x.shape; W=weight.shape[0]
    if state is None: state=jnp.zeros((Bn,W-1,D),jnp.float32)
    if reset is None: reset=jnp.zeros((Bn,T),bool)
    if valid is None: valid=jnp.ones((Bn,T),bool)
    def step(h,inp):
        xt,r,v=inp
        h=jnp.where(r[:,None,None],0,h)
        xt=jnp.where(v[:,None],xt,0).astype(jnp.float32)
        full=jnp.concatenate([h,xt[:,None]],1)
        y=jnp.einsum('bwd,wd->bd',full,weight.astype(jnp.float32))+(0 if bias is None else bias)
        if activation=="silu": y=jax.nn.silu(y)
        return jnp.where(v[:,None,None],full[:,1:],h), jnp.where(v[:,None],y,0)
    h,y=jax.lax.scan(step,state,(x.swapaxes(0,1),reset.T,valid.T))
    return y.swapaxes(0,1).astype(x.dtype),h
