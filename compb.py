import sys; sys.path.insert(0,'/tmp/w'); sys.path.insert(0,'/tmp/stub')
import mosaic_compile as mc
import jax, jax.numpy as jnp
import paged_flash as pf
assert pf.__file__.startswith("/tmp/w")
def go(name,B,T,H,K,D,grad=True,lens="",segs=False,**o):
  s=lambda h: jax.ShapeDtypeStruct((B,T,h,D),jnp.bfloat16)
  i=lambda *x: jax.ShapeDtypeStruct(x,jnp.int32)
  a=dict(query=s(H),key=s(K),value=s(K))
  extra={}
  if "q" in lens: extra["query_seq_lengths"]=i(B)
  if "k" in lens: extra["key_value_seq_lengths"]=i(B)
  if segs: extra["segment_ids"]=i(B,T)
  def f(a,extra):
    loss=lambda q,k,v: pf.flash_attention(q,k,v,**extra,**o,implementation="sm90").astype(jnp.float32).sum()
    if not grad: return pf.flash_attention(**a,**extra,**o,implementation="sm90")
    return jax.grad(loss,(0,1,2))(a['query'],a['key'],a['value'])
  print("==",name,flush=True)
  mc.compile_(f,a,extra)
if __name__=="__main__":
  w=sys.argv[1:]
  A={"lens":lambda g:go("lens",16,4096,16,16,128,g,lens="qk",is_causal=True),"segs":lambda g:go("segs",1,16384,16,16,128,g,segs=True,is_causal=True),
   "fullsegs":lambda g:go("fullsegs",1,16384,16,16,128,g,segs=True),
   "causal":lambda g:go("causal",4,4096,16,16,128,g,is_causal=True),"full":lambda g:go("full",1,16384,16,16,128,g),"d64":lambda g:go("d64",4,4096,32,32,64,g,is_causal=True),
   "d64lens":lambda g:go("d64lens",4,4096,32,32,64,g,lens="qk",is_causal=True),"d256":lambda g:go("d256",2,8192,8,8,256,g,is_causal=True),"d256lens":lambda g:go("d256lens",2,8192,8,8,256,g,lens="qk",is_causal=True)}
  g="grad" in w
  for n in w:
    if n in A: A[n](g)
