"""Operations that compute what torch computes, faster: each has an oracle against torch's own and a switch to turn it off."""
