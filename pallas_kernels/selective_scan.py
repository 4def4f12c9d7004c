"""Interim."""
import jax, jax.numpy as jnp
def selective_scan(x, dt, A, B, C, D=None, z=None, dt_bias=None, state=None, *, dt_softplus=False, reset=None, valid=None, chunk_size=None, implementation=None):
    Bn,T,Di=x.shape; N=A.shape[1]; f=jnp.float32
    if state is None: state=jnp.zeros((Bn,Di,N),f)
    if reset is None: reset=jnp.zeros((Bn,T),bool)
    if valid is None: valid=jnp.ones((Bn,T),bool)
    dt=dt.astype(f)
    if dt_bias is not None: dt=dt+dt_bias
    if dt_softplus: dt=jax.nn.softplus(dt)
    vm=valid[...,None]
    dt=jnp.where(vm,dt,0); xf=jnp.where(vm,x,0).astype(f); Bf=jnp.where(vm,B,0).astype(f); Cf=jnp.where(vm,C,0).astype(f)
    def step(h,i):
        xt,dtt,b,c,r=i
        h=jnp.where(r[:,None,None],0,h)
        h=jnp.exp(dtt[...,None]*A)*h+(dtt*xt)[...,None]*b[:,None]
        return h,jnp.einsum('bdn,bn->bd',h,c)
    h,y=jax.lax.scan(step,state,tuple(a.swapaxes(0,1) for a in (xf,dt,Bf,Cf))+(reset.T,))
    y=y.swapaxes(0,1)
    if D is not None: y=y+D*xf
    if z is not None: y=y*jax.nn.silu(jnp.where(vm,z,0).astype(f))
    return jnp.where(vm,y,0).astype(x.dtype),h
