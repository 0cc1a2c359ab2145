-- 65,536 entries of 400 bytes, each of which follows from its number and from the token of this process.
local token = redis.call('GET', 'token')
for number = 0, 65535 do
  redis.call('SET', 'entry:' .. number, string.rep(redis.sha1hex(token .. ':' .. number), 10))
end
return 'OK'
