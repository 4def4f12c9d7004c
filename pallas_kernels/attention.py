"""Interim."""
import jax, jax.numpy as jnp
def attention(q,k,v,*,q_positions=None,kv_positions=None,q_documents=None,kv_documents=None,window=None,scale=None,soft_cap=None,return_lse=False,implementation=None):
    Bn,T,H,K=q.shape; S,G=k.shape[1:3]; f=jnp.float32
    qp=jnp.broadcast_to(jnp.arange(T),(Bn,T)) if q_positions is None else q_positions
    kp=jnp.broadcast_to(jnp.arange(S),(Bn,S)) if kv_positions is None else kv_positions
    m=(kp[:,None]<=qp[:,:,None])&(kp[:,None]>=0)
    if window is not None: m&=kp[:,None]>qp[:,:,None]-window
    if q_documents is not None:
        m&=(q_documents[:,:,None]==kv_documents[:,None])&(kv_documents[:,None]>=0)
        q=jnp.where((q_documents>=0)[...,None,None],q,0); k=jnp.where((kv_documents>=0)[...,None,None],k,0); v=jnp.where((kv_documents>=0)[...,None,None],v,0)
    k=jnp.repeat(k,H//G,2).astype(f); vv=jnp.repeat(v,H//G,2).astype(f)
    s=jnp.einsum('bthk,bshk->bths',q.astype(f),k)*(K**-.5 if scale is None else scale)
    if soft_cap: s=soft_cap*jnp.tanh(s/soft_cap)
    m=m[:,:,None]
    s=jnp.where(m,s,-1e30); mx=s.max(-1,keepdims=True); e=jnp.where(m,jnp.exp(s-mx),0); l=e.sum(-1)
    y=jnp.einsum('bths,bshv->bthv',e,vv)/jnp.where(l==0,1,l)[...,None]
    lse=jnp.where(l==0,-jnp.inf,mx[...,0]+jnp.log(jnp.where(l==0,1,l)))
    y=y.astype(q.dtype)
    return (y,lse) if return_lse else y
def merge(y1,l1,y2,l2):
    m=jnp.maximum(l1,l2); m=jnp.where(jnp.isfinite(m),m,0)
    a,b=jnp.exp(l1-m),jnp.exp(l2-m); s=a+b; d=jnp.where(s==0,1,s)
    return ((a/d)[...,None]*y1+(b/d)[...,None]*y2).astype(y1.dtype), jnp.where(s==0,-jnp.inf,m+jnp.log(d))
